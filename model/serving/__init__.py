"""The server: what a request may ask, the loop that runs the model, what is answered, and the page."""
