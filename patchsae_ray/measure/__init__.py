"""What is counted: accumulators that merge in any order."""
