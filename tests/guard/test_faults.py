"""Which test shows the expected behaviour of each fault of the catalogue (performance-and-faults.md, section 5)."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FAULTS: dict[tuple[int, str], list[str]] = {
    (5, "memory pressure, failed allocations"): [
        "flow/test_shortage.py::test_every_allocation_may_fail",
        "flow/test_overload.py::test_memory_that_grows_past_its_limit_is_given_back",
        "flow/test_overload.py::test_the_limit_of_a_control_group_is_kept",
    ],
    (6, "slow reader"): [
        "flow/test_relay.py::test_a_reader_that_stops_stops_the_writer_and_loses_nothing",
        "flow/test_tls.py::test_one_byte_at_a_time_and_a_slow_reader",
    ],
    (7, "slow writer, segments of one byte"): ["flow/test_relay.py::test_one_byte_segments_in_a_bulk_stream_neither_hang_nor_lose"],
    (8, "half-close both ways, data after it"): [
        "flow/test_ends.py::test_connections_end_as_designed_beside_the_other_proxies",
        "flow/test_tls.py::test_half_close_is_kept_through_tls",
    ],
    (9, "reset in mid-transfer, from both sides, with data pending"): [
        "flow/test_relay.py::test_a_client_that_resets_mid_stream_frees_everything",
        "flow/test_relay.py::test_an_endpoint_that_resets_while_the_client_does_not_read_still_delivers",
        "flow/test_ends.py::test_two_resets_end_a_connection_that_both_sides_had_blocked",
        "flow/test_tls.py::test_a_reset_travels_through_tls",
    ],
    (10, "black hole"): [
        "flow/test_ends.py::test_a_black_hole_ends_in_the_connect_timeout_and_the_next_endpoint",
        "flow/test_ends.py::test_only_black_holes_end_within_the_budget",
        "flow/test_ends.py::test_a_client_that_leaves_while_we_dial_cancels_the_dial",
    ],
    (11, "refused, unreachable"): [
        "flow/test_ends.py::test_a_refused_dial_goes_to_the_next_endpoint_at_once",
        "netns/test_faults.py::test_an_endpoint_without_a_route_is_left_for_the_next_at_once",
        "netns/test_faults.py::test_nothing_but_endpoints_without_a_route_is_a_reset_that_says_so",
    ],
    (12, "flapping endpoints"): [
        "flow/test_outlier.py::test_no_connection_meets_an_endpoint_after_its_last_failure",
        "flow/test_outlier.py::test_of_three_one_can_be_ejected_and_only_one",
        "flow/test_outlier.py::test_an_endpoint_returns_when_its_time_is_over_and_a_probe_passes",
        "flow/test_reload.py::test_endpoints_that_come_and_go_under_load_fail_no_connection",
    ],
    (13, "endpoint removed with live connections, revocation"): [
        "flow/test_reload.py::test_live_connections_stay_where_they_are_and_new_ones_follow_the_new_plan",
        "flow/test_drain.py::test_connections_of_an_endpoint_that_is_gone_end_when_asked",
        "flow/test_tls_hostile.py::test_a_policy_decides_and_its_change_ends_what_it_no_longer_allows",
        "flow/test_tls_trust.py::test_a_root_revokes_an_intermediate_and_all_below_it",
    ],
    (14, "all endpoints gone"): ["flow/test_ends.py::test_a_cluster_without_endpoints_refuses_and_says_so"],
    (25, "redirect loop"): [
        "flow/test_limits.py::test_a_listener_that_leads_to_itself_refuses",
        "netns/test_capture.py::test_malicious_calls_end_in_counted_refusals_and_never_in_a_loop",
    ],
    (26, "no original destination"): ["netns/test_faults.py::test_a_connection_whose_destination_nobody_knows_goes_nowhere"],
    (27, "server speaks first"): [
        "flow/test_relay.py::test_a_server_may_speak_first",
        "flow/test_tls.py::test_permissive_waits_for_nobody_where_the_server_speaks_first",
    ],
    (28, "kill -9 with rules in place"): [
        "netns/test_capture.py::test_a_crash_fails_closed_and_a_restart_takes_over",
        "netns/test_rules.py::test_removed_without_a_trace_and_foreign_rules_untouched",
    ],
    (29, "upgrade"): [
        "flow/test_upgrade.py::test_no_connection_is_lost_and_no_counter_falls_back",
        "flow/test_upgrade.py::test_live_streams_go_on_without_a_byte_lost",
        "flow/test_upgrade.py::test_a_new_process_that_dies_leaves_the_old_one_serving",
        "netns/test_supervisor.py::test_an_upgrade_touches_no_rule_and_cuts_nothing",
    ],
    (30, "clock jumps, long pauses"): [
        "flow/test_process.py::test_a_wall_clock_that_jumps_ends_nothing_and_delays_nothing",
        "flow/test_process.py::test_a_process_that_stood_still_hears_everybody_before_it_counts_their_time",
        "unit/runtime/test_health.py::test_a_process_that_stood_still_blames_nobody",
    ],
    (31, "storm of reloads"): [
        "flow/test_reload.py::test_a_thousand_rewrites_leak_nothing",
        "flow/test_process.py::test_a_storm_of_hang_ups_is_one_look_at_the_files",
    ],
    (32, "log full or blocked"): ["flow/test_observe.py::test_a_log_that_is_stuck_costs_lines_and_never_traffic"],
    (33, "admin server"): [
        "flow/test_observe.py::test_the_admin_server_survives_abuse",
        "flow/test_observe.py::test_every_page_answers_and_nothing_else_is_allowed",
    ],
    (34, "injection into log and metrics, cardinality"): [
        "unit/config/test_mistakes.py::test_a_mistake_is_named_with_its_line_and_what_is_allowed",
        "native/test_fuzz.py::test_ids_are_taken_exactly_as_the_grammar_says",
        "flow/test_observe.py::test_metrics_are_what_prometheus_wants",
    ],
    (35, "PROXY header split, fused, bad, long, from strangers"): [
        "flow/test_proxy_protocol.py::test_good_headers_give_the_addresses_and_leave_the_payload_alone",
        "flow/test_proxy_protocol.py::test_bad_headers_are_refused_before_anything_is_dialled",
        "flow/test_proxy_protocol.py::test_a_header_from_an_unlisted_source_is_payload",
        "native/test_leaves.py::test_no_bytes_crash_the_proxy_parser",
        "native/test_fuzz.py::test_hostile_bytes_break_no_rule",
    ],
    (36, "ports and buffers run out"): [
        "flow/test_shortage.py::test_every_system_call_may_lack_something",
        "netns/test_outlier.py::test_running_out_of_ports_is_not_the_endpoints_fault",
        "flow/test_limits.py::test_our_own_trouble_is_not_booked_on_the_endpoint",
    ],
    (37, "one worker gets all"): ["flow/test_process.py::test_every_worker_gets_connections_and_the_metrics_tell_how_many"],
    (38, "stale events of a reused descriptor"): [
        "flow/test_relay.py::test_many_short_connections_leave_nothing",
        "flow/test_soak.py::test_hostile_traffic_loses_no_byte_and_leaves_nothing",
    ],
    (39, "worker stuck"): [
        "flow/test_watchdog.py::test_a_worker_that_does_not_wake_up_for_its_work",
        "flow/test_watchdog.py::test_a_worker_in_the_middle_of_a_connection_says_which",
        "netns/test_supervisor.py::test_a_stuck_worker_is_replaced",
    ],
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]} {fault[1]}")
def test_a_fault_has_tests_and_they_exist(fault: tuple[int, str]) -> None:
    assert FAULTS[fault]
    for node in FAULTS[fault]:
        file, _, name = node.partition("::")
        assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.M), f"{node} is gone: name the test that shows it now"
