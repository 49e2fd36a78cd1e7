"""Which policy serves best: the same simulated loads under each, over mixes of lengths and fleets."""
