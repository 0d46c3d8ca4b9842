//! End to end: the stack in a real guest, one scenario after the other.

mod card;
mod cards;
mod connection;
mod console;
mod guest;
mod hostile;
mod reader;
mod state;
