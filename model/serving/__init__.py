"""The server: what a request may ask, the thread that runs the model, what is answered, and the page."""
