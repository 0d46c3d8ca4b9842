//! A card that answers by rule, and our own readers with such cards, run in this process.
//!
//! What the card understands is in [`ins`]; [`pattern`] is what goes over the wire, and both ends know it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use ccid_device::DeviceConfig;
use ccid_device::reader::{Carrier, Reader};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use vscard_protocol::chardev::{Channel, Endpoint, Plaintext};
use vscard_protocol::{
    Atr, Card, CardError, CardSource, Command, Limits, Presence, PresenceWatch, Response, StatusWord,
};

use crate::guest::{Boot, Guest, short_directory, within};

/// Instructions of the card, under class 00. Any other is answered with 6D00.
pub mod ins {
    /// The pattern of P1-P2 bytes, whatever Le says.
    pub const LENGTH: u8 = 0x01;
    /// The pattern of Le bytes. Data, if there is any, has to be its length's pattern.
    pub const LE: u8 = 0x02;
    /// Data has to be its length's pattern; the answer is the length, as four bytes.
    pub const CHECK: u8 = 0x03;
    /// Answers 9000 after P1 seconds.
    pub const SLEEP: u8 = 0x04;
}

/// Bytes that are others for each length, and repeat at no packet's size.
pub fn pattern(length: usize) -> Vec<u8> {
    let seed = (length as u32).wrapping_mul(0x85EB_CA6B);
    (0..length as u32).map(|index| (index.wrapping_add(seed).wrapping_mul(0x9E37_79B1) >> 24) as u8).collect()
}

/// What the card was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sessions {
    /// Power-ons that succeeded.
    pub on: u32,
    /// Sessions that ended.
    pub off: u32,
    /// [`ins::SLEEP`] commands that began.
    pub sleeps: u32,
    /// Those of them that were answered.
    pub wakes: u32,
}

/// A place that always has a card.
pub struct Echo {
    atr: Atr,
    presence: watch::Sender<Presence>,
    sessions: Arc<watch::Sender<Sessions>>,
}

const INSERTION: u64 = 1;

impl Echo {
    /// A card that says T=1.
    pub fn new() -> Result<Self> {
        let atr = Atr::t1(b"echo")?;
        let present = Presence::Present { insertion: INSERTION, atr: atr.clone(), limits: Limits::EXTENDED };
        Ok(Self {
            atr,
            presence: watch::Sender::new(present),
            sessions: Arc::new(watch::Sender::new(Sessions::default())),
        })
    }

    /// What it was asked for until now.
    pub fn sessions(&self) -> Sessions {
        *self.sessions.borrow()
    }

    /// Waits until no session is under way.
    pub async fn unpowered(&self) -> Result<Sessions> {
        self.wait_for("the end of the card's session", |sessions| sessions.on == sessions.off).await
    }

    /// Waits until that many [`ins::SLEEP`] commands began.
    pub async fn sleeping(&self, count: u32) -> Result<Sessions> {
        self.wait_for("a slow command", |sessions| sessions.sleeps >= count).await
    }

    async fn wait_for(&self, what: &str, done: impl FnMut(&Sessions) -> bool) -> Result<Sessions> {
        let mut watch = self.sessions.subscribe();
        let waited = watch.wait_for(done);
        Ok(*within(None, Duration::from_secs(30), what, waited).await??)
    }
}

#[async_trait]
impl CardSource for Echo {
    fn presence(&self) -> PresenceWatch {
        self.presence.subscribe().into()
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        if insertion != INSERTION {
            return Err(CardError::Removed);
        }
        // A reader that does not end one session before the next shows at once.
        let free = self.sessions.send_if_modified(|sessions| {
            let free = sessions.on == sessions.off;
            sessions.on += u32::from(free);
            free
        });
        if !free {
            return Err(CardError::Busy);
        }
        Ok(Box::new(Session { atr: self.atr.clone(), sessions: self.sessions.clone(), busy_until: None }))
    }
}

struct Session {
    atr: Atr,
    sessions: Arc<watch::Sender<Sessions>>,
    /// A command that nobody waits for any more is at work until then.
    busy_until: Option<Instant>,
}

#[async_trait]
impl Card for Session {
    fn atr(&self) -> &Atr {
        &self.atr
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        if let Some(until) = self.busy_until {
            tokio::time::sleep_until(until).await;
            self.busy_until = None;
        }
        if command.header()[..2] == [0, ins::SLEEP] {
            let until = Instant::now() + Duration::from_secs(command.p1().into());
            self.busy_until = Some(until);
            self.sessions.send_modify(|sessions| sessions.sleeps += 1);
            tokio::time::sleep_until(until).await;
            self.busy_until = None;
            self.sessions.send_modify(|sessions| sessions.wakes += 1);
            return Ok(StatusWord::SUCCESS.into());
        }
        Ok(answer(command))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.sessions.send_modify(|sessions| sessions.off += 1);
    }
}

fn answer(command: &Command) -> Response {
    let data = command.data();
    if command.cla() != 0 {
        return StatusWord::CLA_NOT_SUPPORTED.into();
    }
    if data != pattern(data.len()) {
        return StatusWord::INCORRECT_DATA.into();
    }
    match (command.ins(), command.le()) {
        (ins::LENGTH, _) => Response::new(&pattern(command.p1p2().into()), StatusWord::SUCCESS),
        (ins::LE, Some(le)) => Response::new(&pattern(le), StatusWord::SUCCESS),
        (ins::LE, None) => StatusWord::WRONG_LENGTH.into(),
        (ins::CHECK, _) => Response::new(&(data.len() as u32).to_be_bytes(), StatusWord::SUCCESS),
        _ => StatusWord::INS_NOT_SUPPORTED.into(),
    }
}

/// Several readers with a card each on the USB of one guest.
pub struct EchoStack {
    /// The machine; pcscd runs and knows the readers.
    pub guest: Guest,
    /// The cards, in the order of the readers' configurations.
    pub cards: Vec<Arc<Echo>>,
    serials: Vec<String>,
    readers: Vec<JoinHandle<()>>,
    _directory: TempDir,
}

impl EchoStack {
    /// Boots a guest with these arguments for a USB controller, and readers on it. Their serial numbers tell them
    /// apart.
    pub async fn start(controller: &[&str], configs: Vec<DeviceConfig>) -> Result<Self> {
        let directory = short_directory()?;
        let mut args: Vec<String> = controller.iter().map(|&arg| arg.to_owned()).collect();
        let (mut cards, mut serials, mut readers) = (Vec::new(), Vec::new(), Vec::new());
        for (number, config) in configs.into_iter().enumerate() {
            serials.push(config.serial.clone());
            let path = directory.path().join(number.to_string());
            let chardev = format!("socket,id=c{number},path={}", path.display());
            let device = format!("usb-redir,chardev=c{number}");
            args.extend(["-chardev".to_owned(), chardev, "-device".to_owned(), device]);
            // It listens before QEMU connects.
            let channel = Channel::open(Endpoint::UnixListen { path }, Plaintext::LoopbackOnly).await?;
            let card = Arc::new(Echo::new()?);
            let (news, _) = mpsc::unbounded_channel();
            let reader = Reader::new(config, vec![Some(card.clone())], news)?;
            readers.push(tokio::spawn(async move {
                // An endpoint that fails shows as a guest without a reader.
                let _ = reader.run(Carrier::Usbredir { channel, migrate: false }).await;
            }));
            cards.push(card);
        }
        let guest = Guest::boot(Boot::with(args)).await?;
        guest.start_pcscd().await?;
        let stack = Self { guest, cards, serials, readers, _directory: directory };
        stack.pcscd_is_back().await?;
        Ok(stack)
    }

    /// Waits until pcscd has all readers, and their cards.
    pub async fn pcscd_is_back(&self) -> Result<()> {
        let count = self.readers.len();
        self.guest.ok(&format!("guest-pcsc wait-reader 30 {count}")).await?;
        for reader in 0..count {
            self.guest.ok(&format!("guest-pcsc wait-card present 30 {reader}")).await?;
        }
        Ok(())
    }

    /// The number PC/SC programs have for a reader: pcscd finds them in any order.
    pub async fn number(&self, reader: usize) -> Result<usize> {
        let readers = self.guest.ok("guest-pcsc readers").await?;
        let serial = format!("({})", self.serials[reader]);
        let line = readers.lines().find(|line| line.contains(&serial));
        let number = line.and_then(|line| line.split_once(':')).context("no such reader")?.0.parse()?;
        ensure!(number < self.readers.len(), "{readers}");
        Ok(number)
    }
}

impl Drop for EchoStack {
    fn drop(&mut self) {
        self.readers.iter().for_each(JoinHandle::abort);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_abandoned_command_is_waited_for() {
        let echo = Echo::new().expect("a card");
        let mut card = echo.power_on(INSERTION).await.expect("powered");
        assert!(matches!(echo.power_on(INSERTION).await, Err(CardError::Busy)));
        let sleep = Command::build([0, ins::SLEEP, 1, 0], &[], None).expect("a command");
        let quick = Command::build([0, ins::LENGTH, 0, 3], &[], None).expect("a command");
        let start = Instant::now();
        let abandoned = tokio::time::timeout(Duration::from_millis(10), card.transmit(&sleep)).await;
        assert!(abandoned.is_err());
        let answer = card.transmit(&quick).await.expect("an answer");
        assert_eq!((answer.data(), answer.status()), (&pattern(3)[..], StatusWord::SUCCESS));
        assert!(start.elapsed() >= Duration::from_secs(1));
        drop(card);
        assert_eq!(echo.sessions(), Sessions { on: 1, off: 1, sleeps: 1, wakes: 0 });
    }

    #[test]
    fn patterns_differ() {
        let long = pattern(65_536);
        for period in [64, 256, 261, 512, 4096] {
            assert_ne!(long[..64], long[period..period + 64]);
        }
        assert_ne!(pattern(64), pattern(65)[..64]);
    }
}
