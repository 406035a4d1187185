"""The commands ``edm2 NAME``, one module each; only reports that sample images need a framework."""
