"""An HTTP server over one model. Only here is FastAPI known."""
