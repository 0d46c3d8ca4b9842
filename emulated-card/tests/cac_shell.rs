//! The card in its slot. Operations are held up at a gate, so that nothing here waits for a clock.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod common;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use emulated_card::pin::ReferenceData;
use emulated_card::shell::CardSlot;
use vscard_protocol::{Card, CardError, CardSource, Command, Limits, Presence, T0};

use common::{Gate, Keeper, Seen, Store, VERIFY, card_with, pki_aid, select};

fn slot_of(store: Store) -> CardSlot {
    CardSlot::new(card_with(store, ReferenceData::in_memory(3))).unwrap()
}

/// A slot whose key operations wait at a gate.
fn gated() -> (CardSlot, Arc<Seen>, Keeper) {
    let (gate, keeper) = Gate::new();
    let mut store = Store::new(1, 1024);
    store.operation_gate = Some(Arc::new(gate));
    let seen = Arc::clone(&store.seen);
    (slot_of(store), seen, keeper)
}

fn command(bytes: &[u8]) -> Command {
    Command::parse(bytes).unwrap()
}

fn sign(fill: u8) -> Command {
    Command::build([0x00, 0x42, 0x00, 0x00], &[fill; 128], Some(256)).unwrap()
}

async fn status(card: &mut Box<dyn Card>, bytes: &[u8]) -> u16 {
    card.transmit(&command(bytes)).await.unwrap().status().0
}

async fn ready_to_sign(slot: &CardSlot, insertion: u64) -> Box<dyn Card> {
    let mut card = slot.power_on(insertion).await.unwrap();
    assert_eq!(status(&mut card, VERIFY).await, 0x9000);
    assert_eq!(status(&mut card, &select(&pki_aid(0))).await, 0x9000);
    card
}

fn poll_once<T>(future: &mut std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

#[tokio::test]
async fn presence() {
    let slot = slot_of(Store::new(1, 1024));
    let mut presence = slot.presence();
    assert_eq!(presence.get(), Presence::Absent);
    assert_eq!(slot.power_on(1).await.err(), Some(CardError::Removed));
    let first = slot.insert();
    assert_eq!(slot.insert(), first, "it is in already");
    presence.changed().await;
    let Presence::Present { insertion, atr, limits } = presence.get() else { panic!("a card is in") };
    assert_eq!((insertion, limits), (first, Limits::EXTENDED));
    let card = slot.power_on(first).await.unwrap();
    assert_eq!(card.atr(), &atr);
    slot.remove();
    assert_eq!(presence.get(), Presence::Absent);
    let second = slot.insert();
    assert_ne!(first, second);
    assert_eq!(slot.power_on(first).await.err(), Some(CardError::Removed));
    drop(slot);
    assert_eq!(presence.get(), Presence::Absent);
}

#[tokio::test]
async fn one_session_at_a_time() {
    let slot = slot_of(Store::new(1, 1024));
    let insertion = slot.insert();
    let card = slot.power_on(insertion).await.unwrap();
    assert_eq!(slot.power_on(insertion).await.err(), Some(CardError::Busy));
    drop(card);
    assert!(slot.power_on(insertion).await.is_ok());
    // A power-up that nobody waits for is a session that is over.
    drop(slot.power_on(insertion));
    {
        let mut power_on = pin!(slot.power_on(insertion));
        let _ = poll_once(&mut power_on);
    }
    assert!(slot.power_on(insertion).await.is_ok());
}

#[tokio::test]
async fn power_on_clears() {
    let slot = slot_of(Store::new(1, 1024));
    let insertion = slot.insert();
    drop(ready_to_sign(&slot, insertion).await);
    let mut card = slot.power_on(insertion).await.unwrap();
    assert_eq!(status(&mut card, &[0x00, 0x20, 0x00, 0x00]).await, 0x63C3);
    assert_eq!(status(&mut card, &[0x00, 0x56, 0x01, 0x00, 0x00]).await, 0x6D00);
}

#[tokio::test]
async fn a_dropped_future_drops_the_answer_not_the_command() {
    let (slot, seen, keeper) = gated();
    let mut card = ready_to_sign(&slot, slot.insert()).await;
    {
        let first = sign(0xAA);
        let mut first = pin!(card.transmit(&first));
        assert!(poll_once(&mut first).is_pending());
        keeper.arrived.recv().unwrap();
    }
    let second = sign(0xBB);
    let mut second = pin!(card.transmit(&second));
    assert!(poll_once(&mut second).is_pending());
    assert_eq!(seen.operations(), 1, "the second waits for the first");
    keeper.proceed.send(()).unwrap();
    keeper.proceed.send(()).unwrap();
    let response = second.await.unwrap();
    assert_eq!(response.data(), [0xBB; 128], "not the first one's answer");
    assert_eq!(seen.operations(), 2);
}

#[tokio::test]
async fn removal_answers_at_once_and_changes_nothing_later() {
    let (slot, seen, keeper) = gated();
    let first = slot.insert();
    let mut card = ready_to_sign(&slot, first).await;
    {
        let sign = sign(0xAA);
        let mut transmit = pin!(card.transmit(&sign));
        assert!(poll_once(&mut transmit).is_pending());
        keeper.arrived.recv().unwrap();
        slot.remove();
        // The operation still hangs.
        assert_eq!(transmit.await.err(), Some(CardError::Removed));
    }
    let second = slot.insert();
    assert_eq!(card.transmit(&sign(0xAA)).await.err(), Some(CardError::Removed), "another card is in");
    assert_eq!(slot.power_on(first).await.err(), Some(CardError::Removed));
    let mut power_on = pin!(slot.power_on(second));
    assert!(poll_once(&mut power_on).is_pending(), "power-on waits for what hangs");
    keeper.proceed.send(()).unwrap();
    let mut card = power_on.await.unwrap();
    assert_eq!(seen.live_logins(), 0);
    assert_eq!(status(&mut card, &[0x00, 0x20, 0x00, 0x00]).await, 0x63C3);
}

#[tokio::test]
async fn power_off_is_a_barrier() {
    let (gate, keeper) = Gate::new();
    let mut store = Store::new(1, 1024);
    store.unlock_gate = Some(Arc::new(gate));
    let seen = Arc::clone(&store.seen);
    let slot = slot_of(store);
    let insertion = slot.insert();
    let mut card = slot.power_on(insertion).await.unwrap();
    {
        let verify = command(VERIFY);
        let mut transmit = pin!(card.transmit(&verify));
        assert!(poll_once(&mut transmit).is_pending());
        keeper.arrived.recv().unwrap();
    }
    drop(card);
    let mut power_on = pin!(slot.power_on(insertion));
    assert!(poll_once(&mut power_on).is_pending());
    keeper.proceed.send(()).unwrap();
    let mut card = power_on.await.unwrap();
    // It logged in, after the power-off: that login is gone.
    assert_eq!((seen.logins.load(std::sync::atomic::Ordering::SeqCst), seen.live_logins()), (1, 0));
    assert_eq!(status(&mut card, &[0x00, 0x20, 0x00, 0x00]).await, 0x63C3);
}

#[tokio::test]
async fn a_slot_may_go_while_a_card_is_powered() {
    let (slot, _, keeper) = gated();
    let mut card = ready_to_sign(&slot, slot.insert()).await;
    let sign = sign(0xAA);
    {
        let mut transmit = pin!(card.transmit(&sign));
        assert!(poll_once(&mut transmit).is_pending());
        keeper.arrived.recv().unwrap();
        drop(slot);
        assert_eq!(transmit.await.err(), Some(CardError::Removed));
    }
    assert_eq!(card.transmit(&sign).await.err(), Some(CardError::Removed));
}

/// A slot whose store tells of each logout.
fn telling() -> (CardSlot, Receiver<()>) {
    let (told, logged_out) = sync_channel(8);
    let mut store = Store::new(1, 1024);
    store.on_logout = Some(told);
    (slot_of(store), logged_out)
}

#[tokio::test]
async fn power_off_logs_out_at_once_and_so_does_removal() {
    let (slot, logged_out) = telling();
    let card = ready_to_sign(&slot, slot.insert()).await;
    assert!(logged_out.try_recv().is_err());
    drop(card);
    // Nobody powers it on again.
    logged_out.recv().unwrap();
    let _card = ready_to_sign(&slot, slot.insert()).await;
    slot.remove();
    logged_out.recv().unwrap();
}

#[tokio::test]
async fn an_idle_card_forgets_the_pin() {
    let (slot, logged_out) = telling();
    let mut card = ready_to_sign(&slot, slot.insert()).await;
    assert!(logged_out.try_recv().is_err());
    slot.forget_pin(Some(Duration::from_millis(1)));
    logged_out.recv().unwrap();
    // Only the PIN: the container is still selected.
    assert_eq!(status(&mut card, &[0x00, 0x20, 0x00, 0x00]).await, 0x63C3);
    assert_eq!(status(&mut card, &[0x00, 0xA4, 0x02, 0x0C, 0x02, 0x01, 0x00]).await, 0x9000);
    slot.forget_pin(None);
    assert_eq!(status(&mut card, VERIFY).await, 0x9000);
    assert_eq!(status(&mut card, &[0x00, 0x20, 0x00, 0x00]).await, 0x9000);
}

/// As behind QEMU's own reader, where the answer waits for GET RESPONSE outside the card.
#[tokio::test]
async fn what_a_key_gave_is_forgotten_with_the_pin() {
    let (slot, logged_out) = telling();
    let slot = Arc::new(slot);
    let mut card = T0::new(Arc::clone(&slot)).power_on(slot.insert()).await.unwrap();
    assert_eq!(status(&mut card, VERIFY).await, 0x9000);
    assert_eq!(status(&mut card, &select(&pki_aid(0))).await, 0x9000);
    let sign = Command::build([0x00, 0x42, 0x00, 0x00], &[0xAA; 128], None).unwrap();
    let get_response = command(&[0x00, 0xC0, 0x00, 0x00, 0x40]);
    for read in [false, true] {
        assert_eq!(card.transmit(&sign).await.unwrap().status().0, 0x6180);
        if read {
            let half = card.transmit(&get_response).await.unwrap();
            assert_eq!((half.data(), half.status().0), (&[0xAA; 64][..], 0x6140));
        }
        slot.forget_pin(Some(Duration::from_millis(1)));
        logged_out.recv().unwrap();
        slot.forget_pin(None);
        let rest = card.transmit(&get_response).await.unwrap();
        assert_eq!((rest.data(), rest.status().0), (&[][..], 0x6985));
        assert_eq!(card.transmit(&sign).await.unwrap().status().0, 0x6982);
        assert_eq!(status(&mut card, VERIFY).await, 0x9000);
    }
}

#[tokio::test]
async fn a_store_that_panics_takes_the_card_with_it_and_nobody_else() {
    let (gate, keeper) = Gate::new();
    // The gate panics for want of somebody to arrive at.
    drop(keeper);
    let mut store = Store::new(1, 1024);
    store.operation_gate = Some(Arc::new(gate));
    let slot = slot_of(store);
    let insertion = slot.insert();
    let mut presence = slot.presence();
    let mut card = ready_to_sign(&slot, insertion).await;
    assert!(matches!(presence.get(), Presence::Present { .. }));
    assert_eq!(card.transmit(&sign(0xAA)).await.err(), Some(CardError::Removed));
    presence.changed().await;
    assert_eq!(presence.get(), Presence::Absent);
    assert_eq!(card.transmit(&sign(0xAA)).await.err(), Some(CardError::Removed));
    drop(card);
    assert_eq!(slot.power_on(insertion).await.err(), Some(CardError::Removed));
    // Who serves the card learns that there will be none again.
    slot.failed().await;
    slot.insert();
    assert_eq!(slot.presence().get(), Presence::Absent);
}

/// Needs no runtime: any executor that polls will do.
#[test]
fn no_runtime() {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let slot = slot_of(Store::new(1, 1024));
    let insertion = slot.insert();
    let mut future = pin!(async {
        let mut card = slot.power_on(insertion).await.unwrap();
        status(&mut card, VERIFY).await
    });
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let answer = loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(answer) => break answer,
            Poll::Pending => std::thread::park(),
        }
    };
    assert_eq!(answer, 0x9000);
}
