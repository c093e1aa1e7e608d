"""What every HTML page is made of: the frame, thumbnails, plotly."""
