"""The app that Flower takes to hub and islands."""
