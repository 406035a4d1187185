"""All that surrounds a network and needs no framework: options, data, snapshots, the run folder, pictures, seeds."""
