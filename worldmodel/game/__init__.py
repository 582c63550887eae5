"""The window: events in, pictures out. Knows worlds only by their face (`worldmodel.world.World`); never imports torch."""
