"""refattn"""
