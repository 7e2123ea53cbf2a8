"""The process around the data path: sockets, reload, admin, metrics, logs. asyncio lives here and in ``datapath`` alone."""
