//! Any card made fit for a reader that speaks T=0 TPDUs, as QEMU's `usb-ccid` does.

use async_trait::async_trait;

use crate::apdu::ins;
use crate::card::PresenceWatch;
use crate::{Atr, Card, CardError, CardSource, Case, Command, Limits, Presence, Response, StatusWord};

/// A source whose cards look like T=0 cards with short APDUs.
///
/// The ATR becomes T=0 with the same historical bytes ([`Atr::t0`]). A command that has data but, as T=0 demands,
/// no Le is given one, and the response waits for GET RESPONSE behind 61XX (ISO/IEC 7816-3 §12.2.1); a response
/// longer than 256 bytes is handed out in the same way. 6CXX to an Le that was added here is answered here, and a card
/// that finds the command too long with it (6700) gets it as it came. No Le is added to what never has response data: a
/// command that compares or changes a PIN, which is not to be sent twice, and the pieces of a chain.
/// A correct Le is never refused: what is shorter than Le is simply shorter. What waits when its [`Validity`](crate::Validity) ends, as
/// when a verified PIN is forgotten, is gone, and GET RESPONSE is the card's to answer.
pub struct T0<S>(S);

impl<S: CardSource> T0<S> {
    /// Wraps `source`.
    pub fn new(source: S) -> Self {
        Self(source)
    }
}

#[async_trait]
impl<S: CardSource> CardSource for T0<S> {
    fn presence(&self) -> PresenceWatch {
        self.0.presence().map(|presence| match presence {
            Presence::Present { insertion, atr, limits } => Presence::Present {
                insertion,
                atr: as_t0(&atr),
                limits: Limits { response: Limits::SHORT.response, ..limits },
            },
            Presence::Absent => Presence::Absent,
        })
    }

    async fn power_on(&self, insertion: u64) -> Result<Box<dyn Card>, CardError> {
        let presence = self.0.presence();
        let card = self.0.power_on(insertion).await?;
        let atr = as_t0(card.atr());
        Ok(Box::new(T0Card { card, atr, presence, insertion, rest: None }))
    }
}

fn as_t0(atr: &Atr) -> Atr {
    // An ATR has 15 historical bytes at most, so the fallback is never taken.
    Atr::t0(atr.historical()).unwrap_or_else(|_| atr.clone())
}

struct T0Card {
    card: Box<dyn Card>,
    atr: Atr,
    presence: PresenceWatch,
    insertion: u64,
    /// The response that GET RESPONSE has not fetched in full, and how much it has.
    rest: Option<(Response, usize)>,
}

impl T0Card {
    /// At most `le` bytes of a response from `start` on, and the status word that goes with them.
    fn part(&mut self, response: Response, start: usize, le: usize) -> Response {
        let rest = response.data().get(start..).unwrap_or_default();
        let (now, later) = rest.split_at(le.min(rest.len()));
        let read = start + now.len();
        let last = later.is_empty();
        let status = if last { response.status() } else { StatusWord::more(later.len()) };
        let part = Response::new(now, status).valid(response.validity().clone());
        self.rest = (!last).then_some((response, read));
        part
    }
}

/// The even instructions of UPDATE BINARY, PUT DATA and UPDATE RECORD (ISO/IEC 7816-4 §5.4.2).
const UPDATE_BINARY: u8 = 0xD6;
const PUT_DATA: u8 = 0xDA;
const UPDATE_RECORD: u8 = 0xDC;

/// Whether a command never has response data; a card may refuse it with an Le.
fn has_no_response(command: &Command) -> bool {
    let silent = ins::has_reference_data(command.ins())
        || matches!(
            command.ins() & 0xFE,
            ins::MANAGE_SECURITY_ENVIRONMENT | UPDATE_BINARY | PUT_DATA | UPDATE_RECORD
        );
    // ISO/IEC 7816-4 §5.4.1; in a proprietary class the bit may mean anything. GSC-IS has its own, for SIGN/DECRYPT.
    let piece = match command.ins() {
        ins::SIGN_DECRYPT if command.p1() & 0x80 != 0 => true,
        _ => command.cla() & 0x90 == 0x10,
    };
    silent || piece
}

#[async_trait]
impl Card for T0Card {
    fn atr(&self) -> &Atr {
        &self.atr
    }

    async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
        let rest = self.rest.take().filter(|(response, _)| !response.validity().has_ended());
        if let Some((response, start)) = rest.filter(|_| command.ins() == ins::GET_RESPONSE) {
            if self.presence.get().insertion() != Some(self.insertion) {
                return Err(CardError::Removed);
            }
            return Ok(self.part(response, start, command.le().unwrap_or(256).min(256)));
        }
        let data_only = matches!(command.case(), Case::C3Short | Case::C3Extended);
        let response = if data_only && !has_no_response(command) {
            let with_le = |le| {
                Command::build(command.header(), command.data(), Some(le))
                    .map_err(|error| CardError::Failed(error.to_string()))
            };
            let response = self.card.transmit(&with_le(256)?).await?;
            match response.status() {
                status if status.sw1() == 0x6C => {
                    let exact = if status.sw2() == 0 { 256 } else { status.sw2().into() };
                    self.card.transmit(&with_le(exact)?).await?
                }
                StatusWord::WRONG_LENGTH if response.data().is_empty() => self.card.transmit(command).await?,
                _ => response,
            }
        } else {
            self.card.transmit(command).await?
        };
        let at_once = if data_only { 0 } else { command.le().unwrap_or(256).min(256) };
        Ok(if response.data().len() > at_once { self.part(response, 0, at_once) } else { response })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::sync::watch;

    use super::*;
    use crate::Validity;

    /// Answers from a list and keeps what it was sent.
    #[derive(Default)]
    struct Script {
        answers: Mutex<Vec<Vec<u8>>>,
        sent: Mutex<Vec<Vec<u8>>>,
        /// What the answers' validity depends on, if on anything.
        login: Mutex<Option<Arc<()>>>,
    }

    struct ScriptCard(Arc<Script>, Atr);

    #[async_trait]
    impl Card for ScriptCard {
        fn atr(&self) -> &Atr {
            &self.1
        }

        async fn transmit(&mut self, command: &Command) -> Result<Response, CardError> {
            self.0.sent.lock().unwrap().push(command.as_bytes().to_vec());
            let response = Response::parse(&self.0.answers.lock().unwrap().remove(0)).unwrap();
            let login = self.0.login.lock().unwrap();
            Ok(response.valid(login.as_ref().map(Validity::of).unwrap_or_default()))
        }
    }

    struct ScriptSource(Arc<Script>, watch::Sender<Presence>);

    #[async_trait]
    impl CardSource for ScriptSource {
        fn presence(&self) -> PresenceWatch {
            self.1.subscribe().into()
        }

        async fn power_on(&self, _insertion: u64) -> Result<Box<dyn Card>, CardError> {
            Ok(Box::new(ScriptCard(self.0.clone(), Atr::t1(b"card").unwrap())))
        }
    }

    fn present(insertion: u64) -> Presence {
        Presence::Present { insertion, atr: Atr::t1(b"card").unwrap(), limits: Limits::EXTENDED }
    }

    fn source(answers: &[&[u8]]) -> (T0<ScriptSource>, Arc<Script>) {
        let script = Arc::new(Script::default());
        *script.answers.lock().unwrap() = answers.iter().map(|answer| answer.to_vec()).collect();
        (T0::new(ScriptSource(script.clone(), watch::channel(present(1)).0)), script)
    }

    async fn exchange(answers: &[&[u8]], commands: &[&[u8]]) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let (source, script) = source(answers);
        let Presence::Present { atr, limits, .. } = source.presence().get() else { panic!("absent") };
        assert_eq!(atr.to_string(), "3B84400163617264");
        assert_eq!(limits.response, 258);
        let mut card = source.power_on(1).await.unwrap();
        let mut got = Vec::new();
        for command in commands {
            got.push(card.transmit(&Command::parse(command).unwrap()).await.unwrap().as_bytes().to_vec());
        }
        let sent = script.sent.lock().unwrap().clone();
        (got, sent)
    }

    #[tokio::test]
    async fn a_response_to_data_waits_for_get_response() {
        let (got, sent) = exchange(
            &[&[1, 2, 3, 4, 0x90, 0]],
            &[&[0, 0xA4, 4, 0, 2, 0x3F, 0], &[0, 0xC0, 0, 0, 3], &[0, 0xC0, 0, 0, 1]],
        )
        .await;
        assert_eq!(got, [vec![0x61, 4], vec![1, 2, 3, 0x61, 1], vec![4, 0x90, 0]]);
        assert_eq!(sent, [[0, 0xA4, 4, 0, 2, 0x3F, 0, 0]]);
    }

    #[tokio::test]
    async fn verify_is_given_no_le_and_6c_is_served_here() {
        let (got, sent) = exchange(
            &[&[0x90, 0], &[0x6C, 2], &[7, 8, 0x90, 0]],
            &[&[0, 0x20, 0, 0, 1, 0x31], &[0, 0x56, 2, 0, 1, 1]],
        )
        .await;
        assert_eq!(got, [vec![0x90, 0], vec![0x61, 2]]);
        assert_eq!(
            sent,
            [vec![0, 0x20, 0, 0, 1, 0x31], vec![0, 0x56, 2, 0, 1, 1, 0], vec![0, 0x56, 2, 0, 1, 1, 2]]
        );
    }

    #[tokio::test]
    async fn a_card_that_says_61_itself_is_drained_after_what_it_sent() {
        let mut first = vec![0xAA; 256];
        first.extend_from_slice(&[0x61, 0x10]);
        let (got, sent) = exchange(
            &[&first, &[9, 0x90, 0]],
            &[&[0, 0x42, 0, 0, 1, 5], &[0, 0xC0, 0, 0, 0], &[0, 0xC0, 0, 0, 0x10]],
        )
        .await;
        assert_eq!(got[0], [0x61, 0]);
        assert_eq!(got[1], first);
        assert_eq!(got[2], [9, 0x90, 0]);
        assert_eq!(sent[1], [0, 0xC0, 0, 0, 0x10]);
    }

    #[tokio::test]
    async fn any_other_command_throws_the_rest_away() {
        let (got, _) = exchange(
            &[&[1, 2, 0x90, 0], &[0x6A, 0x82], &[0x69, 0x85]],
            &[&[0, 0xA4, 4, 0, 1, 9], &[0, 0xA4, 4, 0, 0], &[0, 0xC0, 0, 0, 2]],
        )
        .await;
        assert_eq!(got, [vec![0x61, 2], vec![0x6A, 0x82], vec![0x69, 0x85]]);
    }
    #[tokio::test]
    async fn a_card_that_minds_the_le_gets_the_command_as_it_came() {
        let command: &[u8] = &[0, 0x88, 0, 0, 1, 0xAA];
        let (got, sent) =
            exchange(&[&[0x67, 0], &[0x90, 0], &[0x67, 0], &[0x67, 0]], &[command, &[0, 0xE0, 0, 0, 1, 9]])
                .await;
        assert_eq!(got, [vec![0x90, 0], vec![0x67, 0]]);
        let with_le = [command, &[0]].concat();
        assert_eq!(sent, [&with_le, command, &[0, 0xE0, 0, 0, 1, 9, 0], &[0, 0xE0, 0, 0, 1, 9]]);
    }

    #[tokio::test]
    async fn what_has_no_response_is_sent_once_and_as_it_came() {
        let headers: [[u8; 4]; 14] = [
            [0, 0x20, 0, 0x80],
            [0, 0x21, 0, 0x80],
            [0, 0x24, 0, 0x80],
            [0, 0x26, 0, 0x80],
            [0, 0x28, 0, 0x80],
            [0, 0x2C, 0, 0x80],
            [0, 0x22, 0x41, 0xB6],
            [0, 0xD6, 0, 0],
            [0, 0xDC, 1, 4],
            [0, 0xDA, 0, 0x6E],
            [0, 0xDB, 0x3F, 0xFF],
            [0x10, 0x87, 0x07, 0x9A],
            [0x10, 0x2A, 0x9E, 0x9A],
            [0x80, 0x42, 0x80, 0],
        ];
        let commands: Vec<_> = headers.iter().map(|header| [&header[..], &[1, 0x31]].concat()).collect();
        let commands: Vec<_> = commands.iter().map(Vec::as_slice).collect();
        let (got, sent) = exchange(&[&[0x67, 0][..]; 14], &commands).await;
        assert_eq!(got, [[0x67, 0]; 14]);
        assert_eq!(sent, commands);
    }

    #[tokio::test]
    async fn get_response_never_gives_more_than_256_bytes() {
        let mut long = vec![7; 300];
        long.extend_from_slice(&[0x90, 0]);
        let (got, _) =
            exchange(&[&long], &[&[0, 0xA4, 4, 0, 1, 9], &[0, 0xC0, 0, 0, 0, 0, 0], &[0, 0xC0, 0, 0, 44]])
                .await;
        assert_eq!(got[1], [&[7; 256][..], &[0x61, 44]].concat());
        assert_eq!(got[2], [&[7; 44][..], &[0x90, 0]].concat());
    }

    #[tokio::test]
    async fn what_a_removed_card_said_is_gone_with_it() {
        let (source, _) = source(&[&[1, 2, 3, 0x90, 0]]);
        let mut card = source.power_on(1).await.unwrap();
        let select = Command::parse(&[0, 0xA4, 4, 0, 1, 9]).unwrap();
        assert_eq!(card.transmit(&select).await.unwrap().as_bytes(), [0x61, 3]);
        let get_response = Command::parse(&[0, 0xC0, 0, 0, 1]).unwrap();
        assert_eq!(card.transmit(&get_response).await.unwrap().as_bytes(), [1, 0x61, 2]);
        source.0.1.send_replace(present(2));
        assert_eq!(card.transmit(&get_response).await.err(), Some(CardError::Removed));
    }

    #[tokio::test]
    async fn what_a_key_gave_does_not_outlive_the_pin() {
        let decrypted = [&[7; 264][..], &[0x90, 0]].concat();
        let decipher = Command::parse(&[0, 0x87, 7, 0x9D, 2, 0x7C, 0]).unwrap();
        let get_response = Command::parse(&[0, 0xC0, 0, 0, 0]).unwrap();
        // Of which nothing was read, and of which a part was.
        for read in [false, true] {
            let (source, script) = source(&[&decrypted, &[0x69, 0x85], &[0x69, 0x82]]);
            *script.login.lock().unwrap() = Some(Arc::default());
            let mut card = source.power_on(1).await.unwrap();
            assert_eq!(card.transmit(&decipher).await.unwrap().as_bytes(), [0x61, 0]);
            if read {
                let part = card.transmit(&get_response).await.unwrap();
                assert_eq!(part.as_bytes(), [&[7; 256][..], &[0x61, 8]].concat());
                assert!(!part.validity().has_ended());
                *script.login.lock().unwrap() = None;
                assert!(part.validity().has_ended());
            }
            *script.login.lock().unwrap() = None;
            // The card's own answer, now that it has forgotten the PIN.
            assert_eq!(card.transmit(&get_response).await.unwrap().as_bytes(), [0x69, 0x85]);
            assert_eq!(card.transmit(&decipher).await.unwrap().as_bytes(), [0x69, 0x82]);
        }
    }
}
