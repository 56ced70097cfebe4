"""What Flower runs: nothing but what hub and islands have installed."""
