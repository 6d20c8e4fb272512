"""What crosses the wire and what crosses a hand-off. Knows nothing of Ray, torch, Modal or HTTP servers."""
