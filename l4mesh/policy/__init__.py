"""Decides, from a configuration, what the tables of a plan hold. Pure: it never sleeps, opens, dials or logs."""
