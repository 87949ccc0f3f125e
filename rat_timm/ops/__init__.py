"""Functions of tensors: windows, neighbourhood attention, grouping, masks. They know no modules and no models."""
