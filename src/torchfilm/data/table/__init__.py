"""A generated world for instructed arms: a torque-limited planar arm, things, a goal, an obstacle."""
