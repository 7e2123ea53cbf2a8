"""What the tests run against: the real process, scripted peers, and the other proxies."""
