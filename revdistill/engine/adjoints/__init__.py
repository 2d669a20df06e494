"""How the way back gets theta_k back: a class and a file per adjoint."""
