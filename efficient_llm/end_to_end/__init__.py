"""The main job: one line that predicts, grows, distributes and reasons."""
