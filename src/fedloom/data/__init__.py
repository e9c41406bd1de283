"""Documents, their split over clients and hold-outs, and the token blocks made of them."""
