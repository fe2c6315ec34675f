"""Loading, running, faster attention, and the demo's recipe; the paper's method is in ltmp.py."""
