"""Growing a trained small model into a large one."""
