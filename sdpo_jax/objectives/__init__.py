"""The parts a method is made of, and the table of methods."""
