"""The engine: quantizes models on disk. Usable as a library; knows neither HTTP nor jobs."""
