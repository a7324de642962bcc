"""What a model cannot see: nullity, collisions, level sets and feature sets, of metrics and of any torch model."""
