"""The compiled pieces, function by function, through a probe that is built for tests only."""
