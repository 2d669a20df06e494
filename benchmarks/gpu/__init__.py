"""The parts of benchmarks/cuda.sh: each module measures one thing on a device and writes JSON lines as it goes."""
