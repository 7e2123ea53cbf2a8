"""The comparison with HAProxy, nginx and Envoy. `python -m bench --help`."""
