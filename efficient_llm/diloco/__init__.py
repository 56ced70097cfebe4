"""Islands that train one model and hardly talk."""
