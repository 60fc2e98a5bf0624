"""A page in the browser over one streamed model: everything it asks goes through one service, so visitors share the sweeps."""
