"""What the routers of a trained run decide: recorded, measured, shown."""
