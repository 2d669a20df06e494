"""One unroll on several processes: what they tell each other, the gradient that they share, the state in parts."""
