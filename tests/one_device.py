"""XLA_FLAGS of the commands that tests start: one device, quickly compiled."""

# Tests compile much and compute little: LLVM's passes would take a third of the suite's time. XLA_FLAGS=--xla_backend_optimization_level=3 before pytest
# has them in the tests' own processes.
ONE_DEVICE = "--xla_backend_optimization_level=0"
