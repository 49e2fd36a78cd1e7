"""The model's inner loop in C++, compiled on the machine that it runs on, for CPUs."""
