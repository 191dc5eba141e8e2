"""omnifer plan: probe slices and training steps here, predict time, storage and dollars."""
