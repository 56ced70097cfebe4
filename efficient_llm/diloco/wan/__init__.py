"""Islands as independent jobs over the internet, around a hub."""
