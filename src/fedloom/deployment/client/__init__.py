"""Client's side: what its owner allows and writes down, the worker that trains, the node that connects it."""
