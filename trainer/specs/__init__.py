"""Pure data: what can be configured, readable as a table of contents.

Standard library only. `trainer.codec` reads and writes these; nothing here knows YAML.
"""
