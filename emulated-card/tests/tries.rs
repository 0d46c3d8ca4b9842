//! Whatever a guest sends, the last try stays.
#![allow(clippy::unwrap_used, reason = "a test says where it failed")]

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use emulated_card::tries::KeepTries;
use proptest::prelude::*;
use tokio::sync::watch;
use vscard_protocol::{
    Atr, Card, CardError, CardSource, Command, Limits, Presence, PresenceWatch, Response, StatusWord,
};

const PIN: &[u8] = b"123456\xFF\xFF";
const PUK: &[u8] = b"12345678";
const WRONG: &[u8] = b"000000\xFF\xFF";

/// A card that takes every class, form and chaining it is offered: whatever slips by is tried.
struct Cards {
    pin: u8,
    puk: u8,
    /// Says 63CX and answers an empty VERIFY; else a failure is 6300 and the question 6A88.
    tells: bool,
    /// A failure leaves a verified PIN verified.
    stays: bool,
    /// Knows VERIFY with P1 = FF.
    forgets: bool,
    /// Tells the tries of the PUK.
    tells_puk: bool,
    /// Under 80, under 82, and under 80 on another channel.
    verified: [bool; 3],
    chain: Vec<u8>,
    sent: Vec<Vec<u8>>,
    /// The next answer is lost.
    breaks: bool,
}

impl Cards {
    fn new(tells: bool, stays: bool) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            pin: 3,
            puk: 3,
            tells,
            stays,
            forgets: true,
            tells_puk: false,
            verified: [false; 3],
            chain: Vec::new(),
            sent: Vec::new(),
            breaks: false,
        }))
    }

    fn failed(&self, left: u8) -> StatusWord {
        if self.tells { StatusWord::tries_left(left) } else { StatusWord(0x6300) }
    }

    fn try_pin(&mut self, status: usize, data: &[u8]) -> StatusWord {
        if self.pin == 0 {
            return StatusWord::AUTHENTICATION_BLOCKED;
        }
        if data.starts_with(PIN) {
            self.pin = 3;
            self.verified[status] = true;
            return StatusWord::SUCCESS;
        }
        self.pin -= 1;
        self.verified[status] &= self.stays;
        self.failed(self.pin)
    }

    fn try_puk(&mut self, data: &[u8]) -> StatusWord {
        if self.puk == 0 {
            return StatusWord::AUTHENTICATION_BLOCKED;
        }
        if data.starts_with(PUK) {
            self.puk = 3;
            return StatusWord::SUCCESS;
        }
        self.puk -= 1;
        self.failed(self.puk)
    }

    fn answer(&mut self, command: &Command) -> StatusWord {
        self.sent.push(command.as_bytes().to_vec());
        if command.cla() & 0x10 != 0 {
            self.chain.extend_from_slice(command.data());
            return StatusWord::SUCCESS;
        }
        let mut data = std::mem::take(&mut self.chain);
        data.extend_from_slice(command.data());
        if command.ins() == 0xC2 && data.len() > 5 {
            data.drain(..5);
            return self.try_pin(0, &data);
        }
        let status = match (command.p2(), command.cla()) {
            (0x82, _) => 1,
            (_, 0x01..=0x03 | 0x40..=0x7F) => 2,
            _ => 0,
        };
        match (command.ins() & 0xFE, command.p2()) {
            (0x20, 0x80 | 0x82) if data.is_empty() && command.p1() == 0xFF && self.forgets => {
                self.verified[status] = false;
                StatusWord::SUCCESS
            }
            (0x20, 0x80 | 0x82) if data.is_empty() => match (self.verified[status], self.tells) {
                (true, true) => StatusWord::SUCCESS,
                (false, true) => StatusWord::tries_left(self.pin),
                (_, false) => StatusWord::REFERENCE_NOT_FOUND,
            },
            (0x20, 0x81) if data.is_empty() && self.tells_puk => StatusWord::tries_left(self.puk),
            // Under 00 too, where it does not tell.
            (0x20, 0x00 | 0x80 | 0x82) if !data.is_empty() => self.try_pin(status, &data),
            (0x24 | 0x26 | 0x28, 0x80) if data.len() >= 8 => self.try_pin(status, &data),
            (0x24, 0x81) if data.len() >= 8 => self.try_puk(&data),
            (0x2C, 0x80) if data.len() >= 8 => match self.try_puk(&data) {
                StatusWord::SUCCESS => {
                    self.pin = 3;
                    StatusWord::SUCCESS
                }
                status => status,
            },
            (0x20 | 0x24, _) => StatusWord::REFERENCE_NOT_FOUND,
            _ => StatusWord::SUCCESS,
        }
    }
}

/// What a card is to a source.
trait Model: Send {
    fn power_on(&mut self) {}

    fn transmit(&mut self, command: &Command) -> Result<StatusWord, CardError>;
}

impl Model for Cards {
    fn power_on(&mut self) {
        self.verified = [false; 3];
        self.chain.clear();
    }

    fn transmit(&mut self, command: &Command) -> Result<StatusWord, CardError> {
        let status = self.answer(command);
        let is_question = command.data().is_empty();
        if !is_question && std::mem::take(&mut self.breaks) { Err(CardError::Mute) } else { Ok(status) }
    }
}

/// A card that is nothing but its answers.
impl<F: FnMut(&Command) -> StatusWord + Send> Model for F {
    fn transmit(&mut self, command: &Command) -> Result<StatusWord, CardError> {
        Ok(self(command))
    }
}

struct Source(Arc<Mutex<dyn Model>>, watch::Sender<Presence>);

struct Powered(Arc<Mutex<dyn Model>>, Atr);

fn atr() -> Atr {
    Atr::t1(b"tries").unwrap()
}

fn source(model: &Arc<Mutex<impl Model + 'static>>, keep: u8) -> KeepTries<Source> {
    let presence = Presence::Present { insertion: 1, atr: atr(), limits: Limits::EXTENDED };
    KeepTries::new(Source(model.clone(), watch::channel(presence).0), keep)
}

/// Powered, with one try kept.
async fn power(answer: impl FnMut(&Command) -> StatusWord + Send + 'static) -> Box<dyn Card> {
    source(&Arc::new(Mutex::new(answer)), 1).power_on(1).await.unwrap()
}

#[async_trait]
impl CardSource for Source {
    fn presence(&self) -> PresenceWatch {
        self.1.subscribe().into()
    }

    async fn power_on(&self, _insertion: u64) -> Result<Box<dyn Card>, CardError> {
        self.0.lock().unwrap().power_on();
        Ok(Box::new(Powered(self.0.clone(), atr())))
    }
}

#[async_trait]
impl Card for Powered {
    fn atr(&self) -> &Atr {
        &self.1
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        self.0.lock().unwrap().transmit(command).map(Response::from)
    }
}

fn command(header: [u8; 4], data: &[u8]) -> Command {
    Command::build(header, data, None).unwrap()
}

async fn status(card: &mut Box<dyn Card>, header: [u8; 4], data: &[u8]) -> u16 {
    card.transmit(&command(header, data)).await.unwrap().status().0
}

const VERIFY: [u8; 4] = [0, 0x20, 0, 0x80];

#[tokio::test]
async fn a_loop_of_wrong_pins_leaves_one_try() {
    let cards = Cards::new(true, false);
    let source = source(&cards, 1);
    let mut card = source.power_on(1).await.unwrap();
    assert_eq!(status(&mut card, VERIFY, WRONG).await, 0x63C2);
    assert_eq!(status(&mut card, VERIFY, WRONG).await, 0x63C1);
    for _ in 0..5 {
        assert_eq!(status(&mut card, VERIFY, WRONG).await, 0x6983);
    }
    // Not even the right one: whether it is cannot be known before.
    assert_eq!(status(&mut card, VERIFY, PIN).await, 0x6983);
    // What the card says is what it says.
    assert_eq!(status(&mut card, VERIFY, &[]).await, 0x63C1);
    assert_eq!(cards.lock().unwrap().pin, 1);
    // Unblocked elsewhere.
    cards.lock().unwrap().pin = 3;
    assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
}

#[tokio::test]
async fn a_card_that_changes_no_pin_uses_no_try_for_it() {
    // Its PIN is verified, so the tries of it are not told; nothing makes it unverified.
    let mut card = power(|command| match (command.ins(), command.p1()) {
        (0x20, 0x00) => StatusWord::SUCCESS,
        (0x24 | 0x2C, 0x00) => StatusWord::CONDITIONS_NOT_SATISFIED,
        _ => panic!("{command:?}"),
    })
    .await;
    let both = [WRONG, WRONG].concat();
    for instruction in [0x24, 0x24, 0x24, 0x2C, 0x2C, 0x2C] {
        assert_eq!(status(&mut card, [0, instruction, 0, 0x80], &both).await, 0x6985);
    }
    assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
    // What a VERIFY is refused for may have been a comparison.
    let mut card = power(|_| StatusWord::CONDITIONS_NOT_SATISFIED).await;
    for expected in [0x6985, 0x6985, 0x6983] {
        assert_eq!(status(&mut card, VERIFY, WRONG).await, expected);
    }
}

/// A CAC whose PIN's tries are not told while it is verified: a PIN that is too short for its token costs none.
#[tokio::test]
async fn a_pin_that_cannot_be_one_uses_no_try() {
    let mut verified = false;
    let mut left = 3;
    let mut card = power(move |command| match command.data() {
        [] if command.p1() != 0 => StatusWord::INCORRECT_P1P2,
        [] if verified => StatusWord::SUCCESS,
        [] => StatusWord::tries_left(left),
        [_, _] => StatusWord::INCORRECT_DATA,
        pin => {
            verified = pin == PIN;
            left = if verified { 3 } else { left - 1 };
            if verified { StatusWord::SUCCESS } else { StatusWord::tries_left(left) }
        }
    })
    .await;
    let verify = [0, 0x20, 0, 0];
    assert_eq!(status(&mut card, verify, WRONG).await, 0x63C2);
    for _ in 0..5 {
        assert_eq!(status(&mut card, verify, b"12").await, 0x6A80);
        assert_eq!(status(&mut card, verify, PIN).await, 0x9000);
    }
}

#[tokio::test]
async fn another_program_gives_a_guest_its_tries_back() {
    // A card whose PIN stays verified is tried no more often for that.
    for (stays, expected) in [(false, [0x63C2, 0x63C1, 0x6983]), (true, [0x63C2, 0x63C1, 0x6983])] {
        let cards = Cards::new(true, stays);
        let mut card = source(&cards, 1).power_on(1).await.unwrap();
        for _ in 0..2 {
            for expected in expected {
                assert_eq!(status(&mut card, [0, 0x20, 0, 0x80], WRONG).await, expected);
            }
            // Right, in the same session with the card.
            assert_eq!(cards.lock().unwrap().try_pin(0, PIN), StatusWord::SUCCESS);
            if stays {
                break;
            }
        }
        assert_eq!(status(&mut card, [0, 0x20, 0, 0x80], PIN).await, 0x9000);
        for expected in expected {
            assert_eq!(status(&mut card, [0, 0x20, 0, 0x80], WRONG).await, expected);
        }
        assert_eq!(cards.lock().unwrap().pin, 1);
    }
}

#[tokio::test]
async fn keeping_none_changes_nothing() {
    let cards = Cards::new(true, false);
    let mut card = source(&cards, 0).power_on(1).await.unwrap();
    for expected in [0x63C2, 0x63C1, 0x63C0, 0x6983] {
        assert_eq!(status(&mut card, VERIFY, WRONG).await, expected);
    }
    assert_eq!(cards.lock().unwrap().sent, vec![command(VERIFY, WRONG).as_bytes().to_vec(); 4]);
}

/// SP 800-73-4 Part 2 §3.2.4: a PIN directly before each use of the key of digital signatures.
#[tokio::test]
async fn the_question_comes_before_the_pin_and_nothing_comes_after_it() {
    let cards = Cards::new(true, false);
    let mut card = source(&cards, 1).power_on(1).await.unwrap();
    for _ in 0..4 {
        assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
        assert_eq!(status(&mut card, [0, 0x87, 0x07, 0x9C], b"digest").await, 0x9000);
    }
    let question = VERIFY.to_vec();
    let verify = command(VERIFY, PIN).as_bytes().to_vec();
    let sign = command([0, 0x87, 0x07, 0x9C], b"digest").as_bytes().to_vec();
    assert_eq!(cards.lock().unwrap().sent.concat(), [question, verify, sign].concat().repeat(4));
}

/// Wrong PUKs must not cost a user the signatures with a PIN that is verified.
#[tokio::test]
async fn one_references_tries_are_not_anothers() {
    let cards = Cards::new(true, false);
    let mut card = source(&cards, 1).power_on(1).await.unwrap();
    assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
    let unblock = [WRONG, PIN].concat();
    for expected in [0x63C2, 0x63C1, 0x6983] {
        assert_eq!(status(&mut card, [0, 0x2C, 0, 0x80], &unblock).await, expected);
    }
    // The same counter under another command.
    assert_eq!(status(&mut card, [0, 0x24, 0, 0x81], &unblock).await, 0x6983);
    assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
    assert_eq!(cards.lock().unwrap().puk, 1);
}

#[tokio::test]
async fn what_hides_a_pin_does_not_reach_the_card() {
    let cards = Cards::new(true, false);
    let mut card = source(&cards, 1).power_on(1).await.unwrap();
    for (class, instruction, expected) in [
        (0x10, 0x20, 0x6884),
        (0x50, 0x24, 0x6884),
        (0x0C, 0x20, 0x6882),
        (0x84, 0x2C, 0x6882),
        (0x60, 0x20, 0x6882),
        (0x00, 0xC2, 0x6D00),
        // GlobalPlatform's channels 4 to 19, of which a question to another channel says nothing.
        (0xC1, 0x20, 0x6E00),
        (0xE0, 0x24, 0x6E00),
        (0x21, 0x20, 0x6E00),
        (0xA0, 0x20, 0x6E00),
        // The PIN as a part of something else, which an empty VERIFY would complete.
        (0x10, 0x87, 0x9000),
        (0x00, 0x20, 0x6883),
    ] {
        assert_eq!(status(&mut card, [class, instruction, 0, 0x80], WRONG).await, expected);
    }
    for malformed in [&[0, 0x20, 0, 0x80, 8][..], &[0, 0x20, 0, 0x80, 0, 0, 8], &[0, 0x24, 0, 0x80, 16]] {
        let answer = card.transmit(&Command::parse(malformed).unwrap()).await.unwrap();
        assert_eq!(answer.status().0, 0x6700);
    }
    assert_eq!(status(&mut card, VERIFY, &[]).await, 0x6883);
    assert_eq!(cards.lock().unwrap().sent, [command([0x10, 0x87, 0, 0x80], WRONG).as_bytes()]);
    // A command on another channel ends no chain.
    assert_eq!(status(&mut card, [1, 0xA4, 0, 0], &[]).await, 0x9000);
    assert_eq!(status(&mut card, VERIFY, &[]).await, 0x6883);
    assert_eq!(status(&mut card, [0, 0xA4, 0, 0], &[]).await, 0x9000);
    assert_eq!(status(&mut card, VERIFY, &[]).await, 0x63C3);
}

#[tokio::test]
async fn a_lost_answer_is_a_try_spent() {
    let cards = Cards::new(false, false);
    let source = source(&cards, 1);
    for _ in 0..5 {
        let mut card = source.power_on(1).await.unwrap();
        cards.lock().unwrap().breaks = true;
        let _ = card.transmit(&command(VERIFY, WRONG)).await;
    }
    assert_eq!(cards.lock().unwrap().pin, 1);
}

/// OpenPGP card 3.4 §7.2.2: one PIN, with a status for signatures and one for all else.
#[tokio::test]
async fn another_name_of_a_verified_pin_does_not_spend_its_tries() {
    const OTHER: [u8; 4] = [0, 0x20, 0, 0x82];
    for forgets in [true, false] {
        let cards = Cards::new(true, false);
        cards.lock().unwrap().forgets = forgets;
        let mut card = source(&cards, 1).power_on(1).await.unwrap();
        assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
        assert_eq!(status(&mut card, OTHER, WRONG).await, 0x63C2);
        assert_eq!(status(&mut card, OTHER, WRONG).await, 0x63C1);
        for _ in 0..3 {
            assert_eq!(status(&mut card, VERIFY, WRONG).await, 0x6983);
        }
        assert_eq!(cards.lock().unwrap().pin, 1);
    }
}

#[tokio::test]
async fn a_pin_verified_on_one_channel_is_not_tried_on_another() {
    let cards = Cards::new(true, false);
    let mut card = source(&cards, 1).power_on(1).await.unwrap();
    assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
    for expected in [0x63C2, 0x63C1, 0x6983] {
        assert_eq!(status(&mut card, [1, 0x20, 0, 0x80], WRONG).await, expected);
    }
    assert_eq!(status(&mut card, VERIFY, WRONG).await, 0x6983);
    assert_eq!(cards.lock().unwrap().pin, 1);
}

/// What 80 refers to changes with the selection; 00 is a name of the first one that tells nothing.
#[tokio::test]
async fn another_applications_tries_are_not_taken_for_a_verified_pins() {
    let pin = Arc::new(Mutex::new(3));
    let left = pin.clone();
    let (mut first, mut verified) = (true, false);
    let mut card = power(move |command| {
        let mut left = left.lock().unwrap();
        match (command.ins(), command.p2(), command.data()) {
            (0xA4, ..) => {
                first = command.p1() == 1;
                StatusWord::SUCCESS
            }
            (_, 0x80, []) if !first => StatusWord::tries_left(15),
            (_, 0x80, []) if verified => StatusWord::SUCCESS,
            (_, 0x80 | 0x82, []) if first => StatusWord::tries_left(*left),
            (_, 0x80 | 0x82, PIN) if first => {
                (verified, *left) = (true, 3);
                StatusWord::SUCCESS
            }
            (_, 0x80 | 0x82, _) if first => {
                *left -= 1;
                StatusWord::tries_left(*left)
            }
            (_, 0x80, _) => StatusWord::tries_left(14),
            _ => StatusWord::REFERENCE_NOT_FOUND,
        }
    })
    .await;
    assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
    for expected in [0x63C2, 0x63C1, 0x6983] {
        assert_eq!(status(&mut card, [0, 0x20, 0, 0x82], WRONG).await, expected);
    }
    assert_eq!(status(&mut card, [0, 0xA4, 2, 0], &[]).await, 0x9000);
    assert_eq!(status(&mut card, VERIFY, WRONG).await, 0x63CE);
    assert_eq!(status(&mut card, [0, 0xA4, 1, 0], &[]).await, 0x9000);
    assert_eq!(status(&mut card, VERIFY, WRONG).await, 0x6983);
    assert_eq!(*pin.lock().unwrap(), 1);
}

#[tokio::test]
async fn a_puk_that_is_told_is_not_spent_where_it_is_not() {
    let cards = Cards::new(true, false);
    cards.lock().unwrap().tells_puk = true;
    let source = source(&cards, 1);
    let unblock = [WRONG, PIN].concat();
    let mut card = source.power_on(1).await.unwrap();
    for expected in [0x63C2, 0x63C1, 0x6983] {
        assert_eq!(status(&mut card, [0, 0x24, 0, 0x81], &unblock).await, expected);
    }
    assert_eq!(status(&mut card, [0, 0x2C, 0, 0x80], &unblock).await, 0x6983);
    drop(card);
    let mut card = source.power_on(1).await.unwrap();
    assert_eq!(status(&mut card, [0, 0x2C, 0, 0x80], &unblock).await, 0x6983);
    assert_eq!(cards.lock().unwrap().puk, 1);
}

/// A host program can block it; the PUK is there for that.
#[tokio::test]
async fn a_blocked_pin_is_unblocked_with_the_puk() {
    for left in [0, 1] {
        let cards = Cards::new(true, false);
        let mut card = source(&cards, 1).power_on(1).await.unwrap();
        assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
        cards.lock().unwrap().pin = left;
        cards.lock().unwrap().verified = [false; 3];
        assert_eq!(status(&mut card, VERIFY, PIN).await, 0x6983);
        assert_eq!(status(&mut card, [0, 0x2C, 0, 0x80], &[PUK, PIN].concat()).await, 0x9000);
        assert_eq!(status(&mut card, VERIFY, PIN).await, 0x9000);
    }
}

/// One reference fails without a number, another one with a high one; neither answers the question.
#[tokio::test]
async fn tries_that_are_not_told_do_not_grow_with_anothers() {
    let pin = Arc::new(Mutex::new(3));
    let left = pin.clone();
    let mut card = power(move |command| match (command.p2(), command.data()) {
        (_, []) => StatusWord::REFERENCE_NOT_FOUND,
        (0x88, _) => StatusWord::tries_left(14),
        _ => {
            *left.lock().unwrap() -= 1;
            StatusWord(0x6300)
        }
    })
    .await;
    for (reference, expected) in [(0x81, 0x6300), (0x88, 0x63CE), (0x81, 0x6300), (0x81, 0x6983)] {
        assert_eq!(status(&mut card, [0, 0x24, 0, reference], WRONG).await, expected);
    }
    assert_eq!(*pin.lock().unwrap(), 1);
}

#[derive(Clone, Debug)]
enum Act {
    Send(Vec<u8>),
    PowerCycle,
    LoseAnswer,
}

fn act() -> impl Strategy<Value = Act> {
    let class = prop_oneof![
        8 => Just(0u8),
        2 => Just(1),
        1 => Just(0x80),
        1 => Just(0x10),
        1 => Just(0x0C),
        1 => any::<u8>(),
    ];
    let instruction = prop_oneof![
        6 => Just(0x20u8),
        1 => Just(0x21),
        2 => Just(0x24),
        2 => Just(0x2C),
        1 => Just(0x26),
        1 => Just(0x28),
        1 => Just(0xC2),
        1 => any::<u8>(),
    ];
    let reference = prop_oneof![
        4 => Just(0x80u8),
        2 => Just(0x81),
        2 => Just(0x82),
        1 => Just(0x00),
        1 => any::<u8>(),
    ];
    let data = prop_oneof![
        4 => Just([WRONG, PIN].concat()),
        2 => Just(WRONG.to_vec()),
        1 => Just(PIN.to_vec()),
        1 => Just([PIN, PIN].concat()),
        1 => Just([PUK, PIN].concat()),
        1 => Just(Vec::new()),
        1 => proptest::collection::vec(any::<u8>(), 0..300),
    ];
    let le = proptest::option::of(prop_oneof![Just(256u32), Just(8), Just(65_536)]);
    let send = (class, instruction, any::<bool>(), reference, data, le).prop_map(
        |(class, instruction, p1, reference, data, le)| {
            let header = [class, instruction, u8::from(p1), reference];
            Act::Send(Command::build(header, &data, le).unwrap().as_bytes().to_vec())
        },
    );
    prop_oneof![12 => send, 1 => Just(Act::PowerCycle), 1 => Just(Act::LoseAnswer)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_commands_spends_the_last_try(
        acts in proptest::collection::vec(act(), 1..60),
        tells: bool,
        stays: bool,
        forgets: bool,
        tells_puk: bool,
        keep in 1u8..=2,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let cards = Cards::new(tells, stays);
        cards.lock().unwrap().forgets = forgets;
        cards.lock().unwrap().tells_puk = tells_puk;
        let source = source(&cards, keep);
        let mut card = runtime.block_on(source.power_on(1)).unwrap();
        for act in acts {
            match act {
                Act::Send(bytes) => {
                    let _ = runtime.block_on(card.transmit(&Command::parse(&bytes).unwrap()));
                }
                Act::PowerCycle => {
                    drop(card);
                    card = runtime.block_on(source.power_on(1)).unwrap();
                }
                Act::LoseAnswer => cards.lock().unwrap().breaks = true,
            }
            let cards = cards.lock().unwrap();
            prop_assert!(cards.pin >= keep && cards.puk >= keep, "PIN {}, PUK {}", cards.pin, cards.puk);
        }
    }
}
