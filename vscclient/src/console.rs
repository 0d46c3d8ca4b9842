//! The commands a user can type on a terminal.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::sync::{Arc, Weak};

use emulated_card::setup::OpenCard;
use emulated_card::shell::CardSlot;
use tokio::sync::mpsc;
use vscard_protocol::{CardSource, Presence, PresenceWatch};

use crate::log::Level;
use crate::session::Wish;

const HELP: &str = "\
insert        put the card into the reader
remove        pull the card out of the reader
select [ID]   choose a reader; there is one, 0
list          the reader, and whether its card is in
debug [N]     verbosity: 0, 1 to 10 for details, above 10 for everything
help          this text
exit          take the card out of the guest and end";

/// Bytes of a line, as of a terminal's.
const MOST_LINE: u64 = 4096;

/// What a console acts on.
pub(crate) struct Console {
    /// Not the card itself: the thread outlives it.
    slot: Option<Weak<CardSlot>>,
    presence: PresenceWatch,
    reader: String,
    level: Level,
    wishes: mpsc::Sender<Wish>,
}

impl Console {
    pub(crate) fn new(card: &OpenCard, reader: String, level: Level, wishes: mpsc::Sender<Wish>) -> Self {
        let slot = card.slot.as_ref().map(Arc::downgrade);
        Self { slot, presence: card.source.presence(), reader, level, wishes }
    }

    /// Reads commands on a thread of its own, if standard input is a terminal; ends with its end.
    pub(crate) fn start(self) {
        if !io::stdin().is_terminal() || !in_foreground() {
            return;
        }
        let spawned = std::thread::Builder::new().name("console".into()).spawn(move || self.run());
        if let Err(error) = spawned {
            tracing::warn!("no console: {error}");
        }
    }

    fn run(mut self) {
        loop {
            print("> ");
            let Ok(Some(line)) = read_line(&mut io::stdin().lock()) else { return print("\n") };
            match self.command(&line) {
                Answer::Text(text) if text.is_empty() => {}
                Answer::Text(text) => print(&format!("{text}\n")),
                Answer::Exit => {
                    let _ = self.wishes.blocking_send(Wish::Leave);
                    return;
                }
            }
        }
    }

    fn command(&mut self, line: &str) -> Answer {
        let mut words = line.split_whitespace();
        let Some(word) = words.next() else { return Answer::Text(String::new()) };
        let argument = words.next();
        // As with the old vscclient, the beginning of a command is enough.
        let known = ["insert", "remove", "select", "list", "debug", "help", "exit"];
        let command = known.into_iter().find(|command| command.starts_with(word)).unwrap_or("help");
        Answer::Text(match command {
            "exit" => return Answer::Exit,
            "debug" => {
                self.level.set(argument.map_or(1, |level| level.parse().unwrap_or(1)));
                String::new()
            }
            "insert" | "remove" | "select" if argument.is_some_and(|id| id != "0") => {
                "there is one reader, 0".into()
            }
            "insert" | "remove" => {
                let is_in = self.is_in();
                let Some(slot) = &self.slot else {
                    return Answer::Text("this card comes and goes with what it is in".into());
                };
                match (command, is_in, slot.upgrade()) {
                    ("insert", true, _) => "the card is in".into(),
                    ("remove", false, _) => "the card is out".into(),
                    ("insert", false, Some(slot)) => {
                        slot.insert();
                        String::new()
                    }
                    (_, _, Some(slot)) => {
                        slot.remove();
                        String::new()
                    }
                    (_, _, None) => String::new(),
                }
            }
            "select" => "reader 0 is selected".into(),
            "list" => {
                let card = if self.is_in() { "card in" } else { "no card" };
                format!("0 {:?} {card}", self.reader)
            }
            _ => HELP.into(),
        })
    }

    fn is_in(&mut self) -> bool {
        matches!(self.presence.get(), Presence::Present { .. })
    }
}

/// The next line, cut where no command is that long; none at the end. What is no text is no command.
fn read_line(input: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let count = input.take(MOST_LINE).read_until(b'\n', &mut line)?;
    Ok((count > 0).then(|| String::from_utf8_lossy(&line).into_owned()))
}

/// A job in the background that reads from its terminal is stopped by the kernel, and the guest with it.
fn in_foreground() -> bool {
    rustix::termios::tcgetpgrp(io::stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Text(String),
    Exit,
}

/// A terminal that is gone is no reason to end.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_that_is_no_text_ends_no_console() {
        let mut typed = &b"inse\xE9rt\nlist\nexit"[..];
        let lines = std::iter::from_fn(|| read_line(&mut typed).unwrap());
        assert_eq!(lines.collect::<Vec<_>>(), ["inse\u{FFFD}rt\n", "list\n", "exit"]);
        let mut endless = io::repeat(b'x');
        let mut endless = io::BufReader::new(&mut endless);
        assert_eq!(read_line(&mut endless).unwrap().map(|line| line.len()), Some(4096));
    }
}
