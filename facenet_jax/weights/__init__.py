"""The portable weights file, importers and exporters."""
