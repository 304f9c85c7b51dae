"""What every room needs: errors, settings, devices, files, figures."""
