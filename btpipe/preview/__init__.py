"""What training will see: images, their views and the numbers behind them."""
