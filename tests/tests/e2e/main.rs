//! End to end: the stack in a real guest, one scenario after the other.

mod card;
mod connection;
mod guest;
mod hostile;
