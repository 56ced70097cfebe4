"""TLT: reinforcement learning whose drafter is trained in the idle time."""
