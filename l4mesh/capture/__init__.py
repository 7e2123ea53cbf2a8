"""Capture: the iptables rules and routes that bring traffic to our listeners, as data (``rules``), as text (``render``), and on a
host (``host``). It decides nothing about single connections.
"""
