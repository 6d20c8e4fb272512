"""What `serve_graph.modal_app` is made of. Modal itself is imported there and in `calls.py` only."""
