//! Small replays, whose whole course is known.
