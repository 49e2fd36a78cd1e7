"""Which policy serves best: the same loads under each, over mixes of lengths and sizes of fleets, simulated."""
