"""Put a run into the lake: plan, open the model, run it once, write. The only folder that imports torch."""
